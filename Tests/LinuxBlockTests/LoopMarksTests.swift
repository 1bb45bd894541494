// SPDX-License-Identifier: Apache-2.0
// Marks of loop devices, without loop devices: what sysfs would say is a folder of the test's.

import Foundation
import Synchronization
import Testing
import TestSupport

@testable import LinuxBlock
@testable import SystemIO

@Suite struct LoopMarksTests {
  private let folder: TemporaryFolder
  private let marks: LoopMarks
  private var names: [String] {
    get throws { try Folder.names(folder.file("run/loops")).sorted() }
  }

  init() throws {
    folder = try TemporaryFolder()
    marks = LoopMarks(folder: folder.file("run/loops"), devices: folder.file("block"))
  }

  /// Gives a device a file, as far as sysfs shows it.
  private func give(_ number: Int32) throws {
    try FileManager.default.createDirectory(
      atPath: folder.file("block/loop\(number)/loop"), withIntermediateDirectories: true)
    try Data("/store\n".utf8).write(
      to: URL(fileURLWithPath: folder.file("block/loop\(number)/loop/backing_file")))
  }

  private func take(_ number: Int32) throws {
    try FileManager.default.removeItem(atPath: folder.file("block/loop\(number)/loop"))
  }

  @Test func aMarkLastsAsLongAsItsDevice() throws {
    try marks.sweep()
    for number: Int32 in [3, 11] {
      let mark = try marks.mark(number)
      #expect(mark.isNew)
      // Its device has no file yet, and is being made.
      try marks.sweep()
      #expect(try names.contains("loop\(number)"))
      try give(number)
      mark.keepUntilHere()
    }
    try marks.sweep()
    #expect(try names == ["loop11", "loop3"])
    #expect(try !marks.mark(3).isNew)
    try take(3)
    try marks.sweep()
    #expect(try names == ["loop11"])
    // The node may be gone as well.
    try FileManager.default.removeItem(atPath: folder.file("block/loop11"))
    try marks.sweep()
    #expect(try names == [])
  }

  @Test func whatTurnedOutToBeAnothersIsUnmarked() throws {
    try marks.mark(0).remove()
    #expect(try names == [])
    try give(1)
    let mark = try marks.mark(1)
    mark.giveUp()
    #expect(try names == [])
  }

  /// Makers and sweepers at once: a device that has a file has a mark, always.
  @Test func noDeviceIsWithoutItsMark() throws {
    let isDone = Atomic(false)
    let wrong = Atomic(0)
    let made = Atomic(0)
    try give(9)
    let crew = 4
    Crew.run(crew) { [self] worker in
      do {
        if worker == 0 {
          for _ in 0..<200 {
            do {
              let mark = try marks.mark(5)
              try give(5)
              mark.keepUntilHere()
            }
            if access(folder.file("run/loops/loop5"), F_OK) != 0 {
              wrong.add(1, ordering: .relaxed)
            }
            made.add(1, ordering: .relaxed)
            try take(5)
          }
          isDone.store(true, ordering: .releasing)
        } else {
          while !isDone.load(ordering: .acquiring) { try marks.sweep() }
        }
      } catch {
        Issue.record("\(error)")
        isDone.store(true, ordering: .releasing)
      }
    }
    #expect(made.load(ordering: .relaxed) == 200)
    #expect(wrong.load(ordering: .relaxed) == 0)
    try marks.sweep()
    #expect(try names == [])
  }
}
