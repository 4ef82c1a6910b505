"""From seeds to images: the stages in order, the files they leave, and previews of one stage."""
