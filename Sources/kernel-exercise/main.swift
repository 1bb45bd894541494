// kernel-exercise device-mapper|loop: the kernel lab's trial of DeviceMapper and of LoopDevice
// against a real kernel. Says nothing when all holds; else one line, and ends with 1.

import DeviceMapper
import Glibc
import Posix

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

let trials: [String: () throws -> Void] = [
  "device-mapper": tryDeviceMapper, "loop": tryLoopDevices, "served": tryServedDevice,
  "supervised": trySupervisedWorker,
]
let names = trials.keys.sorted().joined(separator: "|")
guard CommandLine.arguments.count == 2, let trial = trials[CommandLine.arguments[1]] else {
  complain("usage: kernel-exercise \(names)")
}
do {
  try trial()
} catch {
  complain("\(error)")
}
