// SPDX-License-Identifier: Apache-2.0
// The entries that libFuzzer calls. The environment says what is fuzzed: DMU_FUZZ=use-qcow2,
// link-report and the like; see fuzz/run.

import DiskFormats
import Glibc

/// What this process fuzzes.
private enum FuzzTarget {
  case image(Harness, Mutator)
  case link(LinkHarness)
}

private let target: FuzzTarget = {
  let name = getenv("DMU_FUZZ").map { String(cString: $0) } ?? ""
  if name == "link-report" { return .link(LinkHarness()) }
  let parts = name.split(separator: "-", maxSplits: 1).map(String.init)
  guard parts.count == 2, let effort = Effort(rawValue: parts[0]),
    let kind = FormatList.all.named(parts[1])
  else { fatalError("DMU_FUZZ is head-, read- or use-FORMAT, or link-report, not '\(name)'") }
  return .image(Harness(kind: kind, effort: effort), Mutator(kind: kind))
}()

/// Takes one input. Source: libFuzzer's documentation.
@_cdecl("LLVMFuzzerTestOneInput")
package func fuzz(_ data: UnsafePointer<UInt8>, _ size: Int) -> Int32 {
  let bytes = Array(UnsafeBufferPointer(start: data, count: size))
  switch target {
  case .image(let harness, _): harness.use(bytes)
  case .link(let harness): harness.use(bytes)
  }
  return 0
}

/// Makes an input of another, in place; its new length. Source: libFuzzer's documentation.
@_cdecl("LLVMFuzzerCustomMutator")
package func mutate(
  _ data: UnsafeMutablePointer<UInt8>, _ size: Int, _ most: Int, _ seed: UInt32
) -> Int {
  switch target {
  case .image(_, let mutator): mutator.mutate(data, size, most, seed: seed)
  case .link: mutateBytes(data, size, most)
  }
}
