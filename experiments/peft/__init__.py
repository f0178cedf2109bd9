"""What is added beside frozen weights, measured."""
