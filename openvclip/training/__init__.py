"""What a training run is made of: batches, shards, checkpoints, processes, log, validation."""
