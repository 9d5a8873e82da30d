"""What the inputs of each kernel look like on real batches."""
