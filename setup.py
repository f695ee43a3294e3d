"Hands settings.ini to setuptools: requirements, extras, console scripts and version stand there and nowhere else."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).parent/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {name.removesuffix("_requirements"): cfg[name].split() for name in cfg if name.endswith("_requirements")}

setup(name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0",
      author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"],
      long_description=(Path(__file__).parent/"README.md").read_text(encoding="utf-8"),
      long_description_content_type="text/markdown", packages=find_packages(include=["cxr_noise_study*"]),
      include_package_data=True, python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(),
      extras_require=extras, entry_points={"console_scripts": cfg["console_scripts"].split(),
                                           "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
                                           "cxr_noise_study": [f"dose={cfg['lib_name']}.dose"]},
      zip_safe=False)
