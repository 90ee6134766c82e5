"""From samples to discrete tokens: text to byte-pair ids, pixels to vision codes, documents to one id sequence and back."""
