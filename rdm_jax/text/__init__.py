"""Text encoders: captions and prompts in, embeddings of their tokens out."""
