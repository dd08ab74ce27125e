"""From configurations to a build: tools, sources, objects, the linked library, exports."""
