"""Grade a sample of documents with an LLM, teach a small encoder to grade like it, grade everything, keep the best."""

__version__ = "0.1.0"
