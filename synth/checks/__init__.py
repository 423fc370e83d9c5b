"""What is wrong with a text that a model wrote."""
