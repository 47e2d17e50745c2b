"""Parts of a package of one's own, for configurations with `imports: [extension.parts]`."""
