"""An index in a browser: what is shown (`views`), and the page that shows it (`app`), which needs `pip install 'hf-trak[explore]'`."""
