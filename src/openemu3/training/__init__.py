"""Batches to checkpoints: one loop (trainer), and a learner for each thing that is trained."""
