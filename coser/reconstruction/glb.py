"""The only writer of GLB files: one mesh, one matt PBR material, its texture inside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pygltflib
from PIL import Image

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.primitive import split_vertices

ROUGHNESS = 0.9


def srgb_to_linear(colors: np.ndarray) -> np.ndarray:
    """Colours in [0,1] as pictures store them => linear light, which glTF asks of vertex colours (IEC 61966-2-1)."""
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4).astype(np.float32)


def save_glb(mesh: Mesh, path: str | Path, extras: dict | None = None) -> Path:
    """Writes `mesh` as one GLB file: y up, one matt material, normals, `extras` (JSON) in asset.extras.

    A texture becomes the material's base colour (PNG, sRGB). Vertex colours become COLOR_0 (linear light) where there
    is no texture, since glTF would multiply the two. The views' own shading is part of the colours, and viewers light
    the mesh once more; a matt, non-metallic material keeps that second light soft. Returns the path.
    """
    primitive = split_vertices(mesh)
    attributes = {"POSITION": primitive.positions, "NORMAL": primitive.normals}
    if primitive.uvs is not None:
        attributes["TEXCOORD_0"] = primitive.uvs
    elif primitive.colors is not None:
        attributes["COLOR_0"] = srgb_to_linear(primitive.colors)
    index_type = np.uint16 if len(primitive.positions) < 65535 else np.uint32
    arrays = [a.astype("<f4") for a in attributes.values()] + [primitive.faces.astype(index_type).ravel()]
    gltf = pygltflib.GLTF2(
        asset=pygltflib.Asset(version="2.0", generator="CoSER", extras=extras or {}),
        scene=0, scenes=[pygltflib.Scene(nodes=[0])], nodes=[pygltflib.Node(mesh=0, name="object")],
        materials=[pygltflib.Material(name="matt", pbrMetallicRoughness=pygltflib.PbrMetallicRoughness(
            metallicFactor=0.0, roughnessFactor=ROUGHNESS,
            baseColorTexture=None if mesh.texture is None else pygltflib.TextureInfo(index=0)))],
        meshes=[pygltflib.Mesh(name="object", primitives=[pygltflib.Primitive(
            attributes=pygltflib.Attributes(**{name: i for i, name in enumerate(attributes)}),
            indices=len(attributes), material=0)])])
    blob = b""
    for i, array in enumerate(arrays):
        vertex = i < len(attributes)
        data = array.tobytes()
        gltf.bufferViews.append(pygltflib.BufferView(
            buffer=0, byteOffset=len(blob), byteLength=len(data),
            target=pygltflib.ARRAY_BUFFER if vertex else pygltflib.ELEMENT_ARRAY_BUFFER))
        component = pygltflib.FLOAT if vertex else (
            pygltflib.UNSIGNED_SHORT if index_type is np.uint16 else pygltflib.UNSIGNED_INT)
        gltf.accessors.append(pygltflib.Accessor(
            bufferView=i, componentType=component, count=len(array),
            type=f"VEC{array.shape[1]}" if vertex else "SCALAR",
            min=array.min(0).tolist() if i == 0 else None, max=array.max(0).tolist() if i == 0 else None))
        blob += data + b"\0" * (-len(data) % 4)
    if mesh.texture is not None:
        picture = png_bytes(mesh.texture)
        gltf.bufferViews.append(pygltflib.BufferView(buffer=0, byteOffset=len(blob), byteLength=len(picture)))
        gltf.images = [pygltflib.Image(name="base colour", mimeType="image/png", bufferView=len(arrays))]
        gltf.samplers = [pygltflib.Sampler(magFilter=pygltflib.LINEAR, minFilter=pygltflib.LINEAR_MIPMAP_LINEAR,
                                           wrapS=pygltflib.CLAMP_TO_EDGE, wrapT=pygltflib.CLAMP_TO_EDGE)]
        gltf.textures = [pygltflib.Texture(source=0, sampler=0)]
        blob += picture + b"\0" * (-len(picture) % 4)
    gltf.buffers = [pygltflib.Buffer(byteLength=len(blob))]
    gltf.set_binary_blob(blob)
    Path(path).write_bytes(b"".join(gltf.save_to_bytes()))
    return Path(path)


def glb_vertices(path: str | Path) -> np.ndarray:
    """The vertices [V,3] float32, metres, of a GLB that `save_glb` wrote."""
    gltf = pygltflib.GLTF2().load_binary(str(path))
    accessor = gltf.accessors[gltf.meshes[0].primitives[0].attributes.POSITION]
    start = gltf.bufferViews[accessor.bufferView].byteOffset
    return np.frombuffer(gltf.binary_blob(), "<f4", 3 * accessor.count, start).reshape(-1, 3)


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture, uint8 [H,W,3] or [H,W,4] or uint16 [H,W], as a PNG file's bytes."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
