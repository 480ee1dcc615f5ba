"""Images: readers of folders, tars and npz files, the published evaluation transform, labels, checks of a set."""
