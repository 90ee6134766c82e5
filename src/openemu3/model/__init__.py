"""The one network: a decoder-only transformer over text and vision tokens.

Training and serving share it; how tokens attend to each other is an argument (see `attention.py`).
"""
