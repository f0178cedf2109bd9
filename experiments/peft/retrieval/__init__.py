"""What `modular_retrieval` stands on: its task, what it trains, what it says."""
