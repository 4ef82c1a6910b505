"""What a training needs, before it starts: memory, time and communication."""
