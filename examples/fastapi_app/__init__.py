"""Handles inside a FastAPI application."""
