"""Tests of the models and of what is generated from them."""
