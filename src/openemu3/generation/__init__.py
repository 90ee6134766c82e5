"""Weights to media and text: sampling, the key/value cache, the engine that runs requests together, and the tasks people ask for."""
