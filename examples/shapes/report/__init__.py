"""What writes the pages of the shapes world from their results."""
