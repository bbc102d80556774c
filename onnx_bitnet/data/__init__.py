"""What models are run on: feeds of every kind, checked against the model's inputs."""
