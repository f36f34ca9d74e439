"""The meeting point: what the kernel did (trace) and where pages are (fs) become charges (mm)."""
