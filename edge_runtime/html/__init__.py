"""What the project's self-contained pages share: style and SVG."""
