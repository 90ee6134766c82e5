"""Numbers: what is measured about tokenizers, pictures, clips and answers, and how."""
