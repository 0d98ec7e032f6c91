"""One file a paper. The registry imports every file of this folder."""
