"""Bytes to chunks to frames, with bounded memory; knows neither tower, only Protocols."""
