"""Training loops inside frameworks, each on a tiny CLIP and random clips."""
