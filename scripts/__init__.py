"""Commands that stand on the seven files and that nothing imports."""
