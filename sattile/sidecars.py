"""What the values of a labels map mean, in the files beside it that GIS programs read.

`labels.tif.aux.xml` is GDAL's sidecar (PAM, https://gdal.org/en/stable/drivers/raster/gtiff.html): category names, a
raster attribute table, and a colour table that goes before the file's own, whose TIFF palette knows no transparency and
so shows ids that are no class as opaque black. `labels.qml` is a style that QGIS takes by itself for the file of that
name. A VRT holds the same elements as the sidecar.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

from sattile.cog import rgb
from sattile.schema import SegmentClass

PAM = "labels.tif.aux.xml"
STYLE = "labels.qml"

INTEGER, STRING = "0", "2"
"""Types of columns of an attribute table: GFT_Integer, GFT_String."""

COLUMNS = (
    ("Value", INTEGER, "5"), ("Class", STRING, "2"),
    ("Red", INTEGER, "6"), ("Green", INTEGER, "7"), ("Blue", INTEGER, "8"), ("Alpha", INTEGER, "9"),
)  # fmt: skip
"""Name, type and usage (GFU_MinMax, GFU_Name, GFU_Red and so on) of each: ArcGIS goes by names, GDAL by the usage."""


def band_elements(classes: Sequence[SegmentClass]) -> list[Xml.Element]:
    """Describes a band of class ids in GDAL's XML, of a sidecar or of a VRT: colours, category names, attribute table.

    All 256 values have a colour: those that are no class a transparent one.
    """
    by_id = {one.id: one for one in classes}
    interpretation = Xml.Element("ColorInterp")
    interpretation.text = "Palette"
    names, colors = Xml.Element("CategoryNames"), Xml.Element("ColorTable")
    for value in range(max(by_id, default=-1) + 1):
        Xml.SubElement(names, "Category").text = _text(by_id[value].name) if value in by_id else ""
    for value in range(256):
        color = (*rgb(by_id[value].color), 255) if value in by_id else (0, 0, 0, 0)
        Xml.SubElement(colors, "Entry", {f"c{number}": str(part) for number, part in enumerate(color, start=1)})
    table = Xml.Element("GDALRasterAttributeTable", tableType="thematic")
    for number, column in enumerate(COLUMNS):
        definition = Xml.SubElement(table, "FieldDefn", index=str(number))
        for tag, text in zip(("Name", "Type", "Usage"), column, strict=True):
            Xml.SubElement(definition, tag).text = text
    for number, (value, one) in enumerate(sorted(by_id.items())):
        row = Xml.SubElement(table, "Row", index=str(number))
        for cell in (value, _text(one.name), *rgb(one.color), 255):
            Xml.SubElement(row, "F").text = str(cell)
    return [interpretation, names, colors, table]


def pam(classes: Sequence[SegmentClass], metadata: Mapping[str, str]) -> bytes:
    """Makes the `.aux.xml` of a labels map.

    Args:
        classes: of the map.
        metadata: what else to say of the file, as `gdalinfo` shows it.
    """
    root = Xml.Element("PAMDataset")
    if metadata:
        items = Xml.SubElement(root, "Metadata")
        for name, text in metadata.items():
            Xml.SubElement(items, "MDI", key=name).text = text
    Xml.SubElement(root, "PAMRasterBand", band="1").extend(band_elements(classes))
    return _bytes(root)


def style(classes: Sequence[SegmentClass]) -> bytes:
    """Makes a style of QGIS (3.0 and later): unique values with their names and colours, all else transparent."""
    root = Xml.Element("qgis", version="3.0.0", styleCategories="Symbology")
    render = {"type": "paletted", "band": "1", "opacity": "1", "alphaBand": "-1", "nodataColor": ""}
    palette = Xml.SubElement(Xml.SubElement(Xml.SubElement(root, "pipe"), "rasterrenderer", render), "colorPalette")
    for one in sorted(classes, key=lambda one: one.id):
        entry = {"value": str(one.id), "label": _text(one.name), "color": one.color.lower(), "alpha": "255"}
        Xml.SubElement(palette, "paletteEntry", entry)
    Xml.SubElement(root, "blendMode").text = "0"
    return b"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n" + _bytes(root)


def names_classes(data: bytes, classes: Sequence[SegmentClass]) -> bool:
    """Tells whether a sidecar, by whomever it was written last, has these classes' category names."""
    try:
        found = [one.text or "" for one in Xml.fromstring(data).iterfind("PAMRasterBand/CategoryNames/Category")]
    except Xml.ParseError:
        return False
    # Programs that write XML anew may trim and fold white space.
    return all(one.id < len(found) and found[one.id].split() == _text(one.name).split() for one in classes)


def _text(name: str) -> str:
    """A name without the characters that XML can't hold."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", name)


def _bytes(root: Xml.Element) -> bytes:
    Xml.indent(root)
    return (Xml.tostring(root, encoding="unicode") + "\n").encode()
