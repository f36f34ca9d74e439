"""Physical memory: the NVRAM region, RAM frames with struct pages, one pfn space over both."""
