"""The training loop: DeepSpeed engines, EMA, checkpoints. Imports neither Ray nor MLflow."""
