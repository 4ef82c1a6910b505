"""Images: what can be read (`sources`), written once as records (`prepare`), and fed to training
(`pipeline`)."""
