"""What all other packages use: errors, files, the console, signals, devices and processes."""
