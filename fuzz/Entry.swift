// The entries that libFuzzer calls. The environment says what is fuzzed: DMU_FUZZ=use-qcow2
// and the like; see fuzz/run.

import Glibc
import ImageFormats

/// What this process fuzzes.
private let target: (harness: Harness, mutator: Mutator) = {
  let name = getenv("DMU_FUZZ").map { String(cString: $0) } ?? ""
  let parts = name.split(separator: "-", maxSplits: 1).map(String.init)
  guard parts.count == 2, let effort = Effort(rawValue: parts[0]),
    let kind = ImageKind(rawValue: parts[1])
  else { fatalError("DMU_FUZZ is head-, read- or use-FORMAT, not '\(name)'") }
  return (Harness(kind: kind, effort: effort), Mutator(kind: kind))
}()

/// Takes one input. Source: libFuzzer's documentation.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ data: UnsafePointer<UInt8>, _ size: Int) -> Int32 {
  target.harness.use(Array(UnsafeBufferPointer(start: data, count: size)))
  return 0
}

/// Makes an input of another, in place; its new length. Source: libFuzzer's documentation.
@_cdecl("LLVMFuzzerCustomMutator")
public func mutate(
  _ data: UnsafeMutablePointer<UInt8>, _ size: Int, _ most: Int, _ seed: UInt32
) -> Int {
  target.mutator.mutate(data, size, most, seed: seed)
}
