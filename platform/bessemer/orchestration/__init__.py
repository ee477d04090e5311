"""Ray: starts, heals and resumes runs."""
