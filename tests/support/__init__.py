"""What several test modules share: models made on the spot, and ways to watch processes."""
