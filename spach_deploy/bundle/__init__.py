"""The bundle on disk: manifest, golden pack, files and their digests, and the cache of finished exports."""
