"""Translation of images into images of another kind."""
