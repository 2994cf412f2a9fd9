"""Write the pages of the shapes world from the results of its experiments."""
