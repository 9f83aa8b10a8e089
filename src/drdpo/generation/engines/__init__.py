"""Engines that turn token ids into sampled token ids, behind one interface."""
