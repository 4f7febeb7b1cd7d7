"""What is trained: each task says which parameters, which loss, and what a finished run writes."""
