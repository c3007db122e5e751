"""SAEs on disk and on the Hub: finding, loading, describing, exporting them."""
