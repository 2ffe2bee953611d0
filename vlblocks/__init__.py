"""Composable vision-language pre-training blocks."""
