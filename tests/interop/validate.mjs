// Khronos' validator over GLB files: `node validate.mjs FILE...` prints a JSON line a file, all messages named.
import { readFileSync } from "node:fs";
import validator from "gltf-validator";

for (const path of process.argv.slice(2)) {
  const { issues, info } = await validator.validateBytes(new Uint8Array(readFileSync(path)), { uri: path });
  console.log(JSON.stringify({
    path, errors: issues.numErrors, warnings: issues.numWarnings, infos: issues.numInfos + issues.numHints,
    messages: issues.messages.map((m) => `${m.code} at ${m.pointer}: ${m.message}`),
    triangles: info.totalTriangleCount, textures: info.resources?.filter((r) => r.image).length ?? 0,
  }));
}
