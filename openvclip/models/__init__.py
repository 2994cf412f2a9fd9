"""A CLIP ready for videos: loading, pixels, zero-shot classification, prediction."""
