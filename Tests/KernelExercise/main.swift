// SPDX-License-Identifier: Apache-2.0
// kernel-exercise TRIAL [SEED COUNT]: the kernel lab's trials of DeviceMapper, of LoopDevice and
// of the contract's suites against a real kernel. Says nothing but notes when all holds; else
// one line, and ends with 1.

import Glibc
import LinuxBlock

func complain(_ line: String) -> Never {
  let bytes = Array(("kernel-exercise: " + line + "\n").utf8)
  // There is nobody else to tell.
  _ = write(2, bytes, bytes.count)
  exit(1)
}

func check(_ holds: Bool, _ what: String, line: Int = #line) {
  guard !holds else { return }
  complain("line \(line): \(what)")
}

let arguments = CommandLine.arguments
let numbers = arguments.dropFirst(2).compactMap { UInt64($0) }
let trials: [String: () throws -> Void] = [
  "device-mapper": tryDeviceMapper, "loop": tryLoopDevices, "served": tryServedDevice,
  "supervised": trySupervisedWorker, "rules": tryRules,
  "layers": { try tryLayers(seed: numbers.first ?? 1, count: Int(numbers.last ?? 100)) },
  "traces": { try tryTraces(seed: numbers.first ?? 1, count: Int(numbers.last ?? 500)) },
]
let names = trials.keys.sorted().joined(separator: "|")
guard arguments.count == 2 || numbers.count == 2, let trial = trials[arguments[1]] else {
  complain("usage: kernel-exercise \(names) [SEED COUNT]")
}
do {
  try trial()
} catch {
  complain("\(error)")
}
