"""From seeds to images: the stages one after the other, and pictures of them."""
