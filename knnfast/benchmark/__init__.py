"""Measuring: what `knnfast bench`, `faiss_reference` and bench/ share. Nothing else imports it."""
