"""The bundle on disk: its manifest, golden pack and files, and the store in which finished bundles are cached."""
