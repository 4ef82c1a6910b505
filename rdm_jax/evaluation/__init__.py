"""How good are the images? Features, distances between sets of them, and the pages that show
them."""
