"""The demo model's files; `fastlora.load("demo")` reads them. scripts/make_demo/ makes them."""
